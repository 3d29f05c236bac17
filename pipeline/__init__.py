"""What several scripts share and no model needs: config, batch plan, data, run folder, environment."""
