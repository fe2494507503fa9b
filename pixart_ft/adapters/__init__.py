"""LoRA adapters: which layers, attached, saved, found again, loaded with every weight accounted for, merged."""
