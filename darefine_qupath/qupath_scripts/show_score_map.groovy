/**
 * Lay the network's map over the image: its class for every pixel, or how sure it was ("confidence", "margin",
 * "runner_up"). Run it with layer = "" to take it off. Opacity: the slider in QuPath's toolbar.
 *
 * The map is what `darefine predict` left beside the project; nothing is computed here.
 *
 * QuPath 0.4 to 0.7.
 */
import javafx.application.Platform
import javax.imageio.ImageIO
import qupath.lib.gui.scripting.QPEx
import qupath.lib.gui.viewer.overlays.BufferedImageOverlay
import qupath.lib.io.GsonTools
import qupath.lib.regions.ImageRegion

String layer = "class"

def viewer = QPEx.getCurrentViewer()
def entry = QPEx.getProjectEntry()
if (viewer == null || entry == null) {
    println "Open an image of a project first"
    return
}
if (layer.isEmpty()) {
    Platform.runLater { viewer.resetCustomPixelLayerOverlay() }
    return
}

def folder = new File(QPEx.getProject().getPath().toFile().getParentFile(), "darefine/maps/" + entry.getID())
def file = new File(folder, layer + ".tif")
if (!file.isFile()) {
    println "There is no ${file}; predict this image first"
    return
}
def info = GsonTools.getInstance().fromJson(new File(folder, "scoremap.json").getText("UTF-8"), Map)
def box = info.box.collect { it as int }

// The file is a pyramid: take its finest level that is small enough to be drawn quickly.
def stream = ImageIO.createImageInputStream(file)
def reader = ImageIO.getImageReaders(stream).next()
def image
try {
    reader.setInput(stream)
    int count = reader.getNumImages(true)
    int level = (0..<count).findIndexOf { Math.max(reader.getWidth(it), reader.getHeight(it)) <= 6000 }
    image = reader.read(level < 0 ? count - 1 : level)
} finally {
    reader.dispose()
    stream.close()
}

def region = ImageRegion.createInstance(box[0], box[1], box[2], box[3], viewer.getZPosition(), viewer.getTPosition())
Platform.runLater { viewer.setCustomPixelLayerOverlay(new BufferedImageOverlay(viewer.getOverlayOptions(), region, image)) }
println "${layer}: ${image.getWidth()} x ${image.getHeight()} pixels over ${box[2]} x ${box[3]}"
