//! The Cleave virtual machine monitor.
#![allow(dead_code, unused_imports)]

mod arch;
mod bus;
mod cli;
mod config;
mod kvm;
mod legacy;
mod memory;
mod pci;
mod plan;
mod vhost;
mod virtio;

fn main() {}
