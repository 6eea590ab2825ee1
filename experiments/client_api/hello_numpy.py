"""Each site moves the weights towards its own mean."""

import numpy as np

import fedsim.client as flare  # in NVFlare: import nvflare.client as flare

flare.init()
site = int(flare.get_site_name().rpartition("-")[2])
while flare.is_running():
    model = flare.receive()
    weights = model.params.get("weights", np.zeros(4, dtype=np.float32))
    distance = float(np.abs(weights - site).mean())
    trained = weights + 0.5 * (site - weights)
    flare.send(flare.FLModel(params={"weights": trained}, metrics={"distance": distance}))
