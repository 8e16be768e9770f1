/**
 * Predict every image of the open project with DA-RefineNet, and show the polygons of the image that is open.
 *
 * Save all images that are open before: what is not on the disk when darefine reads it is lost when the data is
 * read again. The image in the current viewer is saved by this script.
 *
 * QuPath 0.4 to 0.7.
 */
import javafx.application.Platform
import javafx.stage.FileChooser
import java.util.concurrent.FutureTask
import java.util.prefs.Preferences
import qupath.lib.gui.scripting.QPEx

boolean askAgain = false

def project = QPEx.getProject()
if (project == null) {
    println "Open a project first"
    return
}
def entry = QPEx.getProjectEntry()
def viewer = QPEx.getCurrentViewer()

def program = remembered("program", "The darefine program (in the bin or Scripts folder of its environment)", askAgain)
def model = remembered("model", "The model file (model.safetensors)", askAgain)
if (program == null || model == null)
    return

if (entry != null)
    entry.saveImageData(QPEx.getCurrentImageData())
project.syncChanges()

def command = [program, "predict", project.getPath().toString(), "--model", model, "--engine", "embedded"]
boolean isDone = runLogged(command)
// Also after an error: images that were finished before it have new polygons.
if (entry != null)
    onFxThread { viewer.setImageData(entry.readImageData()) }
if (isDone)
    println "Done. `darefine undo` takes the polygons back"

/** Run a program, its output in the log; whether it ended well. */
boolean runLogged(List<String> command) {
    println command.join(" ")
    def process = new ProcessBuilder(command).redirectErrorStream(true).start()
    process.inputStream.eachLine("UTF-8") { println it }
    int code = process.waitFor()
    if (code != 0)
        println "darefine ended with code ${code}; the lines above say why. Images that it finished are predicted"
    return code == 0
}

/** A file that was chosen before, or is chosen now. */
String remembered(String key, String title, boolean askAgain) {
    def store = Preferences.userRoot().node("darefine")
    def known = store.get(key, null)
    if (known != null && new File(known).isFile() && !askAgain)
        return known
    def chosen = onFxThread {
        def chooser = new FileChooser()
        chooser.setTitle(title)
        chooser.showOpenDialog(null)
    }
    if (chosen == null) {
        println "Nothing was chosen for: ${title}"
        return null
    }
    store.put(key, chosen.getAbsolutePath())
    return chosen.getAbsolutePath()
}

/** What a closure gives that has to run on JavaFX's own thread. */
def onFxThread(Closure action) {
    if (Platform.isFxApplicationThread())
        return action.call()
    def task = new FutureTask({ action.call() } as java.util.concurrent.Callable)
    Platform.runLater(task)
    return task.get()
}
