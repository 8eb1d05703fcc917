"""A machine's life over QMP, as someone writes it who knows QEMU: control.py SOCKET. Fails loudly."""

import asyncio
import sys

from qemu.qmp import ExecuteError, QMPClient


async def expect(listener, name):
    event = await asyncio.wait_for(listener.get(), 120)
    assert event["event"] == name, f"{event} where {name} was to come"
    assert event["timestamp"]["seconds"] > 0
    return event.get("data")


async def refused(qmp, command, arguments, words):
    try:
        await qmp.execute(command, arguments)
    except ExecuteError as error:
        assert words in str(error), error
        return error
    raise AssertionError(f"{command} {arguments} was not refused")


async def main(socket):
    qmp = QMPClient("newcomer")
    await qmp.connect(socket)
    with qmp.listener() as events:
        assert (await qmp.execute("query-status")) == {"running": True, "status": "running"}
        assert (await qmp.execute("query-name"))["name"] == "trial"
        assert (await qmp.execute("query-kvm"))["enabled"]
        assert len(await qmp.execute("query-cpus-fast")) == 2
        names = {command["name"] for command in await qmp.execute("query-commands")}
        assert {"stop", "cont", "quit", "query-qmp-schema"} <= names
        commands = [i for i in await qmp.execute("query-qmp-schema") if i["meta-type"] == "command"]
        assert {command["name"] for command in commands} == names

        await qmp.execute("stop")
        await expect(events, "STOP")
        assert (await qmp.execute("query-status"))["status"] == "paused"
        await qmp.execute("stop")
        await qmp.execute("cont")
        await expect(events, "RESUME")
        await qmp.execute("cont")

        [device] = await qmp.execute("x-cleave-query-devices")
        assert device["name"] == "disk0" and device["state"] == "connected", device
        await qmp.execute("x-cleave-restart-device", {"device": "disk0"})
        assert (await expect(events, "X_CLEAVE_DEVICE_LOST"))["device"] == "disk0"
        back = await expect(events, "X_CLEAVE_DEVICE_RECOVERED")
        print(f"disk0 was away for {back['downtime-ms']} ms")
        [again] = await qmp.execute("x-cleave-query-devices")
        assert again["restarts"] == 1 and again["pid"] != device["pid"], again

        error = await refused(qmp, "stopp", None, "did you mean 'stop'?")
        assert error.error_class == "CommandNotFound"
        error = await refused(qmp, "x-cleave-restart-device", {"device": "disk1"}, "did you mean 'disk0'?")
        assert error.error_class == "DeviceNotFound"
        await refused(qmp, "stop", {"hard": True}, "stop has no arguments")

        await qmp.execute("stop")
        await expect(events, "STOP")
        await qmp.execute("system_reset")
        assert (await expect(events, "RESET"))["guest"] is False
        assert (await qmp.execute("query-status"))["status"] == "paused"
        await qmp.execute("cont")
        await expect(events, "RESUME")
        await qmp.execute("system_powerdown")
        await expect(events, "POWERDOWN")
        await qmp.execute("quit")
        assert (await expect(events, "SHUTDOWN"))["reason"] == "host-qmp-quit"
    await qmp.disconnect()
    print("passed")


asyncio.run(asyncio.wait_for(main(sys.argv[1]), 300))
