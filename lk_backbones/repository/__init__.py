"""How `lk_backbones.hub` builds models from weights and writes repositories; not public."""
