//! COM1's registers.

use serde::{Deserialize, Serialize};
use vm_superio::serial::SerialState;

/// The registers of a 16550 (see [`SerialState`], which has no format of its own).
#[derive(Debug, Serialize, Deserialize)]
#[serde(remote = "SerialState")]
struct Registers {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    in_buffer: Vec<u8>,
}

/// The registers of a 16550.
#[derive(Debug, Serialize, Deserialize)]
pub struct SerialPort(#[serde(with = "Registers")] pub SerialState);
