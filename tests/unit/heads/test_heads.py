import torch

from diffrep import AttentionPool, LinearHead


def test_attention_pool_learns_where_things_are():
    """Two classes with the same mean feature, told apart by the place of one cell: pooling by mean could not."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(64) % 2
    maps = 0.1 * torch.randn(64, 3, 4, 4, generator=generator)
    maps[labels == 0, :, 0, 0] += 2
    maps[labels == 1, :, 3, 3] += 2
    torch.manual_seed(0)
    head = AttentionPool(3, (4, 4), 2, width=16, depth=1, heads=2, dropout=0)
    optimizer = torch.optim.Adam(head.parameters(), 1e-2)
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(head(maps), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    head.eval()
    assert (head(maps).argmax(1) == labels).all()
    assert head(maps.half()).dtype == torch.float32


def test_linear_head_standardises():
    head = LinearHead(2, 3)
    head.mean.copy_(torch.tensor([1.0, 2.0]))
    head.std.copy_(torch.tensor([2.0, 4.0]))
    torch.testing.assert_close(head(torch.tensor([[3.0, 6.0]])), head.linear(torch.ones(1, 2)))
    assert head(torch.zeros(5, 2, 1, 1)).shape == (5, 3)
