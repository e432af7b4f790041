use polymq::prelude::*;

#[polymq::main(threads = 4)]
async fn main(bus: Bus, second: u8) -> Result<()> {
    Ok(())
}
