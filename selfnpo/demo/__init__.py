"""The embedded demo on 8x8 digits: its base model, its judges, and its reports on a negative.

base        the model, and the command that made its weights        metrics     the quality of digits
baselines   other negatives for comparison                          evaluation  paired comparison over seeds
run_report  the end of a training run on the demo                   report      tables, sentences, a plot
"""
