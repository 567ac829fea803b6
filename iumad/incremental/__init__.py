"""Learning classes over time: protocols, the leak guard and the update rules."""
