"""A client that trains nothing: it adds 1 to a 3 x 3 array."""

import fedsim.client as flare

flare.init()
while flare.is_running():
    model = flare.receive()
    flare.send(flare.FLModel(params={"w": model.params["w"] + 1}))
