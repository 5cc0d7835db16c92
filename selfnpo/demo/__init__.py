"""The embedded demo on 8x8 digits: its base model, its judges, and what it says about a negative.

base        the model, and the command that made its weights        metrics     how good are digits?
baselines   other negatives, to compare with                        evaluation  paired comparison over seeds
run_report  the end of a training run on the demo                   report      tables, sentences, a plot
"""
