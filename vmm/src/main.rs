//! The Cleave virtual machine monitor.
#![allow(dead_code, unused_imports)]

mod bus;
mod cli;
mod config;
mod kvm;
mod legacy;
mod memory;
mod pci;
mod plan;

fn main() {}
