//! A broker at an address, with or without a folder: `serve 127.0.0.1:50000 /var/lib/polymq`.

#[tokio::main]
async fn main() -> Result<(), polymq_broker::BrokerError> {
    let mut arguments = std::env::args().skip(1);
    let mut builder = polymq_broker::Broker::builder();
    if let Some(address) = arguments.next() {
        builder = builder.listen(address);
    }
    if let Some(folder) = arguments.next() {
        builder = builder.data_dir(folder);
    }
    let broker = builder.start().await?;
    println!("listening on {}", broker.address());
    let _ = tokio::signal::ctrl_c().await;
    broker.stop().await;
    Ok(())
}
