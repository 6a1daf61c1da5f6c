"""What any trainer needs: files of rows, models, devices, checkpoints, logs, pictures. Nothing of the method."""
