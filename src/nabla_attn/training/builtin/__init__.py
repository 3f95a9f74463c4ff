"""The model that ships with the package: its recipe, its own small loop, its parts."""
