#[polymq::main]
fn main() {}
