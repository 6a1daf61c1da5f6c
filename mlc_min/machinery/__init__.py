"""What any trainer needs: models, devices, checkpoints, logs, tables, pictures, errors. Nothing of the method."""
