//! `#[polymq::main]` with the bus and an error of the program's own.
#![deny(warnings)]
use polymq::Bus;

/// Documented.
#[polymq::main]
pub async fn main(bus: Bus) -> Result<(), std::io::Error> {
    assert_eq!(bus.backend(), "memory");
    Ok(())
}
