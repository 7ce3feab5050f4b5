"""Train a small GPT with jaxce's loss that never holds the logits.

    python -m jaxce.examples.language_model                  a few minutes on two cores
    python -m jaxce.examples.language_model --loss dense     the same curve with the logits in memory
    python -m jaxce.examples.language_model --data ~/notes   your own text: a file, or all files in a folder
    python -m jaxce.examples.language_model --tokens bytes   256 classes instead of thousands
    python -m jaxce.examples.language_model --mode store     gradients in the forward pass
    python -m jaxce.examples.language_model --processes 2    each with half of the embedding table
    python -m jaxce.examples.language_model --objective distill   a small student learns from the network
    python -m jaxce.examples.language_model --objective dpo       preferences after the text, by log-probabilities

The text is what comes with Python: its reference manual, and the licences and documentation of
the installed packages. Nothing is downloaded. The embedding table [V, D] is the output layer too,
and the loss takes it as it is. The program prints what memory both losses need and a table of the
loss, and writes curves.png and history.json to --output-dir; it ends with text of its own.

Needs the extra: pip install "jaxce[examples]"
"""
