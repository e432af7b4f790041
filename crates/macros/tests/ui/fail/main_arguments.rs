#[polymq::main(threads = 4)]
async fn main(bus: polymq::Bus, second: u8) -> Result<(), polymq::Failure> {
    Ok(())
}
