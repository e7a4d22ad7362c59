"""What a person calls: train, evaluate, export, sweep, report, show, plan, smollm2."""
