#[polymq::main]
async fn main() {}
