//! The Cleave virtual machine monitor.
#![allow(dead_code)]

mod cli;
mod config;
mod kvm;
mod memory;

fn main() {}
