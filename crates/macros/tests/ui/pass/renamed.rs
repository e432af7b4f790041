//! The macros with the crate under another name, and on polymq-core alone.
#![deny(warnings)]
#![no_implicit_prelude]
extern crate polymq as mq;

#[mq::consumer("orders", crate = mq)]
async fn facade() {}

#[mq::consumer("orders", kind = "order.created", crate = ::polymq_core, timeout = "1s", attempts = 2)]
async fn core_alone(_order: ::std::string::String) {}

#[derive(mq::Message)]
#[message(crate = ::polymq_core)]
struct Order;

#[mq::main(crate = mq)]
async fn main() -> ::std::result::Result<(), mq::Failure> {
    let _ = Order;
    // The backend is in this process, but two consumers of one queue with different kinds are fine.
    ::std::process::exit(0)
}
