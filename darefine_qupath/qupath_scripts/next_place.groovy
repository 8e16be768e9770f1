/**
 * Go to the next place that is worth a look: the annotations "Review 01", "Review 02" ... that
 * `darefine next PROJECT -n 20 --mark` made. Run it again for the one after; after the last it starts over.
 *
 * QuPath 0.4 to 0.7. Give it a key: save it as a shared script, then Automate > Shared scripts.
 */
import javafx.application.Platform
import qupath.lib.gui.scripting.QPEx

def viewer = QPEx.getCurrentViewer()
def places = QPEx.getAnnotationObjects()
    .findAll { it.getPathClass() == null && it.getName() ==~ /Review \d+/ }
    .sort { it.getName() }
if (viewer == null || places.isEmpty()) {
    println "There is no place to review in this image; `darefine next PROJECT -n 20 --mark` makes them"
    return
}
def current = QPEx.getSelectedObject()
int index = places.findIndexOf { it == current }
def next = places[(index + 1) % places.size()]

Platform.runLater {
    def roi = next.getROI()
    double room = 1.2
    double across = roi.getBoundsWidth() * room / Math.max(1, viewer.getView().getWidth())
    double down = roi.getBoundsHeight() * room / Math.max(1, viewer.getView().getHeight())
    viewer.setDownsampleFactor(Math.max(across, down))
    viewer.setCenterPixelLocation(roi.getCentroidX(), roi.getCentroidY())
    viewer.setSelectedObject(next)
}
println "${next.getName()} (${places.indexOf(next) + 1} of ${places.size()})"
