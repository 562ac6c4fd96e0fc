"""The worker: three lines in a user's own loop.

from worker import join
with join("tcp://host:5555", model, optimizer) as session:
    for x, y in loader:
        loss = loss_fn(model(x), y); loss.backward(); optimizer.step(); optimizer.zero_grad()
        session.step(loss, samples=len(x))
"""

from worker.trainer import Session, join

__all__ = ["Session", "join"]
