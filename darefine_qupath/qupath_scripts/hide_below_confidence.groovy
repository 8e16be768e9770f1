/**
 * Hide the predictions whose confidence is below a limit; 0 shows all again.
 *
 * QuPath 0.6 and 0.7 hide them. QuPath 0.4 and 0.5 cannot hide single objects: there the script selects them, so that
 * they stand out and can be rejected together.
 */
import qupath.lib.gui.scripting.QPEx

double limit = 0.6

def isBelow = { object ->
    def confidence = object.getMeasurements().get("DA-RefineNet: confidence")
    return confidence != null && confidence.doubleValue() < limit
}
def below = QPEx.getAllObjects(false).findAll { isBelow(it) }
def options = QPEx.getCurrentViewer()?.getOverlayOptions()
if (options == null) {
    println "Open an image first"
    return
}
if (options.metaClass.respondsTo(options, "setShowObjectPredicate")) {
    options.setShowObjectPredicate(limit > 0 ? ({ !isBelow(it) } as java.util.function.Predicate) : null)
    println limit > 0 ? "${below.size()} predictions are below ${limit} and hidden" : "All predictions are shown"
} else {
    QPEx.selectObjects(below)
    println "${below.size()} predictions are below ${limit} and selected"
}
QPEx.getCurrentViewer().repaint()
