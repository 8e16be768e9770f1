"""Read, edit, verify and create QuPath's ``data.qpdata``: the objects of one image and what stands beside them.

`read` turns a whole file into records; `document` opens a file to be edited, so that most objects stay bytes; `edit`
applies changes to a document, and `verify` compares what an edit made with what it was made of. `create` makes the
first file of an image, and `summary` the ``summary.json`` that QuPath keeps beside each.
"""
