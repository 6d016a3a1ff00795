// ======== gradients

// An operator through the dispatcher, where tracing sees it.
template <class Signature> auto operation(const char* name) {{
    return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}}

struct Fused : torch::autograd::Function<Fused> {{
    static {returned} forward(torch::autograd::AutogradContext* context,
        {parameters}) {{
        const at::AutoDispatchBelowADInplaceOrView below;
        static const auto run = operation<decltype(fusewright_forward)>("FUSEWRIGHT_NAMESPACE::forward");
        const auto results = run.call({names});
        context->save_for_backward({{{saved}}});
        return {wrap};
    }}

    static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
        torch::autograd::variable_list gradients) {{
        static const auto run = operation<decltype(fusewright_backward)>("FUSEWRIGHT_NAMESPACE::backward");
        const auto saved = context->get_saved_variables();
        const std::vector<size_t> places{{{places}}};  // of the arguments that have gradients
        std::vector<int64_t> wanted;
        for (size_t place : places) wanted.push_back(context->needs_input_grad(place));
        const auto computed = run.call({arguments}, wanted);
        torch::autograd::variable_list result({count});
        size_t next = 0;
        for (size_t i = 0; i < places.size(); ++i)
            if (wanted[i]) result[places[i]] = computed[next++];
        return result;
    }}
}};

{type} fused_autograd({parameters}) {{
    fusewright_fused_check({names});
    if (at::GradMode::is_enabled() && ({any_grad})) {{
        const auto outputs = Fused::apply({names});
        return {result};
    }}
    const at::AutoDispatchBelowADInplaceOrView below;
    static const auto run = operation<decltype(fusewright_fused)>("FUSEWRIGHT_NAMESPACE::fused");
    return run.call({names});
}}

// What `backward` gives when its own gradient may be asked for: the same, and an error if it is.
struct FirstDerivative : torch::autograd::Function<FirstDerivative> {{
    static torch::autograd::variable_list forward(torch::autograd::AutogradContext*,
        {backward_parameters}, std::vector<int64_t> wanted) {{
        const at::AutoDispatchBelowADInplaceOrView below;
        static const auto run = operation<decltype(fusewright_backward)>("FUSEWRIGHT_NAMESPACE::backward");
        return run.call({backward_names}, wanted);
    }}

    static torch::autograd::variable_list backward(torch::autograd::AutogradContext*, torch::autograd::variable_list) {{
        TORCH_CHECK(false, "these kernels compute first derivatives only; use the original model for double backward");
    }}
}};

std::vector<at::Tensor> backward_autograd({backward_parameters}, at::IntArrayRef wanted) {{
    fusewright_backward_check({backward_names});
    if (at::GradMode::is_enabled() && ({any_backward_grad}))
        return FirstDerivative::apply({backward_names}, wanted.vec());
    const at::AutoDispatchBelowADInplaceOrView below;
    static const auto run = operation<decltype(fusewright_backward)>("FUSEWRIGHT_NAMESPACE::backward");
    return run.call({backward_names}, wanted);
}}
