"""One small network, trained by each of the losses on two Gaussians, and the spread of its samples.

python examples/losses.py
"""

import torch
from torch import Tensor, nn

from sdeflow import VP, Empirical, Prediction, sample
from sdeflow.losses import DSM, P2, SSM, EDMLoss, FlowMatching, InputPerturbation, MinSNR, Simple

LOSSES = {
    "eps": Simple("eps", stratified=True),
    "v": Simple("v", stratified=True),
    "velocity": FlowMatching(stratified=True),
    "EDM": EDMLoss(sigma_data=1.0),
    "min-SNR": Simple(weight=MinSNR(5.0), stratified=True),
    "P2": Simple(weight=P2(), stratified=True),
    "denoising score matching": DSM("sigma2", stratified=True),
    "sliced score matching": SSM(probes=2, stratified=True),
    "input perturbation": InputPerturbation(Simple(stratified=True), 0.1),
}
process = VP()
data = torch.cat([torch.randn(500, 1) * 0.2 - 1, torch.randn(500, 1) * 0.2 + 1])
exact = sample(Empirical(data, process=process), nfe=20, n=1000, seeds=0)
print(f"{'data':26} std {data.std():.3f}, samples of the exact denoiser {exact.std():.3f}")
for name, loss in LOSSES.items():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU())
    layers.append(nn.Linear(64, 1))

    def network(x: Tensor, t: Tensor, layers: nn.Module = layers) -> Tensor:
        """v."""
        s, sigma = (c.float().unsqueeze(1) for c in process.kernel(t))
        return layers(torch.cat([x, s, sigma], 1))

    model = Prediction(network, "v", process, shape=(1,))
    optimiser = torch.optim.Adam(layers.parameters(), 3e-3)
    for _ in range(300):
        optimiser.zero_grad()
        loss(model, data[torch.randint(1000, (256,))]).mean().backward()
        optimiser.step()
    x = sample(model, nfe=20, n=1000, seeds=0)
    near = ((x.abs() - 1).abs() < 0.6).float().mean()
    print(f"{name:26} std {x.std():.3f}, {near:.0%} near one of the two")
