//! The few things a PC has that are not PCI: the 16550 uart, and the ports by which ACPI powers off and resets.
//!
//! What is absent is absent on purpose: no PIT, no CMOS clock, no keyboard controller beyond its reset command. The
//! ACPI tables say so, and a stock kernel asks none of them.

pub mod line;
pub mod power;
pub mod terminal;
pub mod uart;
