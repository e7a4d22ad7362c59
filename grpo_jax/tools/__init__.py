"""The commands that a person calls: train, evaluate, export, sweep, report, show, plan, fields, smollm2."""
