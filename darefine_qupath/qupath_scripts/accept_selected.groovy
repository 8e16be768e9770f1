/**
 * Accept the selected predictions: they are locked (that is the mark), belong to you from now on, and train the next model
 * (`darefine train --labels reviewed`). The next prediction gives way to them.
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
predictions.each { it.setLocked(true) }
QPEx.fireHierarchyUpdate()
println "Accepted ${predictions.size()}, left ${selected.size() - predictions.size()} alone. Save the image to keep it"

/**
 * Whether darefine wrote an object. Its metadata say so: measurements do not last, QuPath takes them away when the
 * outline is edited.
 */
boolean isPrediction(object) {
    boolean isNew = object.metaClass.respondsTo(object, "getMetadata")
    def metadata = isNew ? object.getMetadata() : object.getUnmodifiableMetadataMap()
    return metadata.containsKey("darefine.run")
}
