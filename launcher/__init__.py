"""How a run is started, shown and compared."""
