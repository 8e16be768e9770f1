/**
 * Reject the selected predictions: they are deleted. darefine remembers the place: the class does not come back
 * there, and `darefine train --labels reviewed` ignores the area unless you draw in it what it really is.
 *
 * Only predictions of darefine are deleted; anything else that is selected stays.
 *
 * QuPath 0.4 to 0.7.
 */
import qupath.lib.gui.scripting.QPEx

def selected = QPEx.getSelectedObjects().toList()
def predictions = selected.findAll { isPrediction(it) }
if (predictions.isEmpty()) {
    println "Select one or more predictions first"
    return
}
QPEx.removeObjects(predictions, true)
QPEx.resetSelection()
QPEx.fireHierarchyUpdate()
println "Rejected ${predictions.size()}, left ${selected.size() - predictions.size()} alone. Save the image to keep it"

/**
 * Whether darefine wrote an object. Its metadata say so: measurements do not last, QuPath takes them away when the
 * outline is edited.
 */
boolean isPrediction(object) {
    boolean isNew = object.metaClass.respondsTo(object, "getMetadata")
    def metadata = isNew ? object.getMetadata() : object.getUnmodifiableMetadataMap()
    return metadata.containsKey("darefine.run")
}
