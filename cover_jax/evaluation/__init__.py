"""What a model has learnt: test splits, frozen features and their protocols, reports and pictures."""
