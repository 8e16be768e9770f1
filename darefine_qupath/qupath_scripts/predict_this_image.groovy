/**
 * Predict the image that is open, with DA-RefineNet, and show the polygons.
 *
 * The image's data is saved first, then `darefine predict` runs on it, then the data is read again.
 * The first time, this asks for the darefine program and for the model file; both are remembered.
 * To be asked again, set askAgain to true.
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
def entry = QPEx.getProjectEntry()
def viewer = QPEx.getCurrentViewer()
if (project == null || entry == null || viewer == null) {
    println "Open a project and one of its images first"
    return
}

def program = remembered("program", "The darefine program (in the bin or Scripts folder of its environment)", askAgain)
def model = remembered("model", "The model file (model.safetensors)", askAgain)
if (program == null || model == null)
    return

// What is on the screen must be on the disk before another program reads it.
entry.saveImageData(QPEx.getCurrentImageData())
project.syncChanges()

def command = [program, "predict", project.getPath().toString(), "--model", model, "--image", entry.getID(), "--engine", "embedded"]
if (runLogged(command)) {
    onFxThread { viewer.setImageData(entry.readImageData()) }
    println "Done. `darefine undo` takes the polygons back"
}

/** Run a program, its output in the log; whether it ended well. */
boolean runLogged(List<String> command) {
    println command.join(" ")
    def process = new ProcessBuilder(command).redirectErrorStream(true).start()
    process.inputStream.eachLine("UTF-8") { println it }
    int code = process.waitFor()
    if (code != 0)
        println "darefine ended with code ${code}; the lines above say why. Nothing was changed in the project by this script"
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
