//! x86-64: what a vCPU shows and starts with, how a kernel is put into memory, and the tables it reads.
//!
//! Everything here takes plain values (addresses, counts, files) and knows neither the plan nor the machine.

pub mod acpi;
pub mod boot;
pub mod cpuid;
pub mod layout;
pub mod msr;
pub(crate) mod regs;
