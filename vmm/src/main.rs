//! The Cleave virtual machine monitor.
#![allow(dead_code)]

mod cli;
mod config;

fn main() {}
