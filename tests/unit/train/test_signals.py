import pytest

# Steps of 10 ms, of a run that goes on from step 100,000; rank 1 alone is told to end after half a second.
RUN = """
import signal, time
from accelerate import Accelerator
from diffrep.train.signals import StopRequest

accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
with StopRequest(accelerator) as stop:
    for step in range(100_001, 101_001):
        time.sleep(0.01)
        if step == 100_050 and accelerator.process_index == 1:
            signal.raise_signal(signal.SIGTERM)
        if stop.asked(step):
            break
print(step)
"""


@pytest.mark.mp
def test_all_processes_of_a_run_that_was_resumed_soon_end_after_the_same_step(two_processes):
    done = two_processes.run(source=RUN)
    assert done.codes == [0, 0], done.err
    first, second = map(int, done.out)
    assert first == second
    assert 100_050 <= first < 100_600
