"""How well methods learn at equal steps: scores, not seconds."""
