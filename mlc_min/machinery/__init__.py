"""What any trainer needs: rows in files, models, devices, checkpoints, logs, tables, pictures, errors. Nothing of the method."""
