use polymq::prelude::*;

#[consumer("orders")]
fn not_async() {}

#[consumer("orders", blocking)]
async fn async_and_blocking() {}

struct Service;

impl Service {
    #[consumer("orders")]
    async fn method(&self) {}
}

#[consumer("orders")]
async fn generic<T>(_order: T) {}

#[consumer("orders")]
async fn borrowed(_text: &str) {}

#[consumer("orders")]
async fn opaque(_text: impl ToString) {}

#[consumer("orders")]
async unsafe fn unsafe_handler() {}

#[consumer("orders", batch = 8)]
async fn batch_with_two(_orders: Batch<u64>, _context: Context) {}

#[consumer("orders", batch = 8, blocking)]
fn blocking_batch(_orders: Batch<u64>) {}

#[consumer("orders")]
async fn nine(_1: u8, _2: Body, _3: Body, _4: Body, _5: Body, _6: Body, _7: Body, _8: Body, _9: Body) {}

#[consumer("orders")]
struct NotAFunction;

fn main() {}
