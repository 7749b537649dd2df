"""The program: `resnet-func train | evaluate | predict | summary`."""
