//! `#[polymq::main]`: wraps `async fn main` in `polymq::run`.

use proc_macro2::{Span, TokenStream};
use quote::quote;
use syn::{Error, FnArg, ItemFn, Result, ReturnType, Visibility, parse::Parser};

use crate::options::{Options, Problems};

pub(crate) fn expand(options: TokenStream, item: TokenStream) -> TokenStream {
    let wrapped = syn::parse2::<ItemFn>(item)
        .map_err(|error| {
            Error::new(error.span(), "#[polymq::main] goes on a function: async fn main(bus: Bus) -> Result<()>")
        })
        .and_then(|function| wrap(options, &function));
    wrapped.unwrap_or_else(|error| {
        let error = error.to_compile_error();
        // Without a main function the compiler would complain about that too.
        quote!(#error fn main() {})
    })
}

fn wrap(options: TokenStream, function: &ItemFn) -> Result<TokenStream> {
    let mut problems = Problems::default();
    let krate = problems.take(
        (|input: syn::parse::ParseStream<'_>| Options::parse(input, &["crate"], &[]))
            .parse2(options)
            .and_then(|options| options.krate()),
    );
    let signature = &function.sig;
    if signature.ident != "main" {
        problems.at(&signature.ident, "#[polymq::main] goes on the function `main`");
    }
    if signature.asyncness.is_none() {
        problems.at(signature.fn_token, "write `async fn main`");
    }
    if !signature.generics.params.is_empty() {
        problems.at(&signature.generics, "`main` has no generic parameters");
    }
    if let ReturnType::Default = signature.output {
        problems.add(Error::new(
            signature.paren_token.span.close(),
            "`main` returns a Result, so that errors are told: async fn main(bus: Bus) -> Result<()>",
        ));
    }
    if let Some(FnArg::Receiver(receiver)) = signature.inputs.first() {
        problems.at(receiver, "`main` takes the bus, or nothing: async fn main(bus: Bus) -> Result<()>");
    }
    if let Some(second) = signature.inputs.iter().nth(1) {
        problems.at(second, "`main` takes the bus, or nothing: async fn main(bus: Bus) -> Result<()>");
    }
    problems.into_result()?;
    let Some(krate) = krate else { return Ok(TokenStream::new()) };
    let main = syn::Ident::new("main", Span::call_site());
    let call = if signature.inputs.is_empty() { quote!(|_bus: #krate::Bus| #main()) } else { quote!(#main) };
    let mut function = function.clone();
    let visibility = std::mem::replace(&mut function.vis, Visibility::Inherited);
    Ok(quote! {
        #visibility fn main() -> ::std::process::ExitCode {
            #function
            #krate::run(#call)
        }
    })
}
