/**
 * Lay the network's map over the image: its class for every pixel, or how sure it was ("confidence", "margin",
 * "runner_up"). Run it with layer = "" to take it off. Opacity: the slider in QuPath's toolbar.
 *
 * Classes have their colours; of confidence and margin, white is sure. What was not predicted stays clear. The map is
 * what `darefine predict` left beside the project; nothing is computed here.
 *
 * QuPath 0.4 to 0.7.
 */
import java.awt.image.BufferedImage
import java.awt.image.DataBuffer
import java.awt.image.IndexColorModel
import javafx.application.Platform
import javax.imageio.ImageIO
import qupath.lib.gui.scripting.QPEx
import qupath.lib.gui.viewer.overlays.BufferedImageOverlay
import qupath.lib.io.GsonTools
import qupath.lib.regions.ImageRegion

String layer = "class"
int largest = 6000

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
def sidecar = new File(folder, "scoremap.json")
if (!file.isFile() || !sidecar.isFile()) {
    println "There is no finished ${file}; predict this image first"
    return
}
def info = GsonTools.getInstance().fromJson(sidecar.getText("UTF-8"), Map)
def box = info.box.collect { it as int }

// The file is a pyramid: take its finest level that is small enough to be drawn quickly.
def stream = ImageIO.createImageInputStream(file)
def readers = ImageIO.getImageReaders(stream)
if (!readers.hasNext()) {
    stream.close()
    println "Java cannot read ${file}: it is a BigTIFF (a map of more than 2 GB)"
    return
}
def reader = readers.next()
def image
try {
    reader.setInput(stream)
    int count = reader.getNumImages(true)
    int level = (0..<count).findIndexOf { Math.max(reader.getWidth(it), reader.getHeight(it)) <= largest }
    image = reader.read(level < 0 ? count - 1 : level)
} finally {
    reader.dispose()
    stream.close()
}

// What was not predicted is 255 in maps of classes and 0 in maps of scores; a TIFF has no transparent colour.
boolean hasClasses = layer in ["class", "runner_up"]
int missing = hasClasses ? 255 : 0
def colours = (0..255).collect { int value ->
    int rgb = hasClasses ? image.getColorModel().getRGB(value) & 0xffffff : value * 0x010101
    value == missing ? 0 : (255 << 24) | rgb
} as int[]
def colourModel = new IndexColorModel(8, 256, colours, 0, true, -1, DataBuffer.TYPE_BYTE)
def coloured = new BufferedImage(colourModel, image.getRaster(), false, null)

def region = ImageRegion.createInstance(box[0], box[1], box[2], box[3], viewer.getZPosition(), viewer.getTPosition())
Platform.runLater { viewer.setCustomPixelLayerOverlay(new BufferedImageOverlay(viewer.getOverlayOptions(), region, coloured)) }
println "${layer}: ${image.getWidth()} x ${image.getHeight()} pixels over ${box[2]} x ${box[3]}"
