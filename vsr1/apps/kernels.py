"""Execute one notebook by papermill, in a kernel that need not import torch again: it is forked where that is done."""

import asyncio
import multiprocessing
import os
from contextlib import suppress
from importlib.metadata import EntryPoint
from pathlib import Path

import papermill
from ipykernel.kernelapp import IPKernelApp
from jupyter_client.provisioning import KernelProvisionerFactory, LocalProvisioner
from nbclient.exceptions import DeadKernelError

from vsr1.apps import pipeline
from vsr1.config import InputError

# The process that executes a notebook has imported what a kernel needs, and has computed nothing.
FORK = multiprocessing.get_context("fork")
PROVISIONER = EntryPoint("forked", f"{__name__}:ForkedKernel", KernelProvisionerFactory.GROUP_NAME)
OPTIONS = {
    "kernel_name": "python3",
    "language": "python",
    "progress_bar": False,
    # Else kernels warn that they talk over TCP (on loopback), and some that they were interrupted at their end.
    "extra_arguments": ["--IPKernelApp.log_level=CRITICAL"],
    "shutdown_kernel": "immediate",  # nothing is left to do then; asking a kernel to end takes two seconds
}


def execute(source: Path, copy: Path, parameters: dict) -> None:
    """Execute the notebook `source` and keep the executed copy.

    Raises InputError where a cell fails; then the copy has another name, and one that was there stays.
    """
    factory = KernelProvisionerFactory.instance()
    factory.provisioners[PROVISIONER.name] = PROVISIONER
    factory.default_provisioner_name = PROVISIONER.name
    running, failed = (copy.with_name(f"{source.stem}.{state}.ipynb") for state in ("running", "failed"))
    # Forked now, while there is no event loop that a kernel would inherit.
    options, ForkedKernel.options = FORK.Pipe(duplex=False)
    ForkedKernel.process = FORK.Process(target=_run_kernel, args=(options,))
    ForkedKernel.process.start()
    try:
        papermill.execute_notebook(source, running, parameters, cwd=source.parent, **OPTIONS)
    except (papermill.PapermillExecutionError, DeadKernelError) as error:
        os.replace(running, failed)
        reason = f"{source.stem}: the kernel died, most likely for lack of memory"
        if isinstance(error, papermill.PapermillExecutionError):
            reason = f"{source.stem}, cell [{error.exec_count}]: {error.ename}: {error.evalue}"
        raise InputError(f"notebook {reason}; the executed copy is {failed}") from error
    finally:
        ForkedKernel.process.kill()
    os.replace(running, copy)
    failed.unlink(missing_ok=True)


class ForkedKernel(LocalProvisioner):
    """A kernel in a process that waits for its options, and ends with the one that executes its notebook."""

    async def launch_kernel(self, cmd, env, **_):
        """Start the kernel of a command line, `python -m ipykernel_launcher` and its options."""
        self.options.send((cmd[cmd.index("ipykernel_launcher") + 1 :], env, os.getcwd()))
        return self.connection_info

    async def poll(self):
        """Return the exit status of the kernel, None while it runs."""
        return self.process.exitcode

    async def wait(self):
        """Wait for the end of the kernel and return its exit status."""
        while (status := await self.poll()) is None:
            await asyncio.sleep(0.05)
        return status

    async def send_signal(self, signum):
        """Send a signal to the kernel and all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signum)


def _run_kernel(pipe):
    os.setsid()  # Ctrl-C in a terminal is for the process that began it all
    pipeline.end_with_parent()
    options, env, folder = pipe.recv()
    os.environ |= env
    os.chdir(folder)
    IPKernelApp.launch_instance(options)
