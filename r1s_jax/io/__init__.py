"""Where what comes from outside is checked: the ground that every other room stands on."""
