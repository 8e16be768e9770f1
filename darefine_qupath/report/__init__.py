"""Draw what people look at: overlays, contact sheets of tiles, plots of a training."""
