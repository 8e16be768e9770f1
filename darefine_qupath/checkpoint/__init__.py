"""Save, load and describe model files: weights with everything that prediction needs to know of them."""
