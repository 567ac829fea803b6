// Tabs: show the panel whose data-tab equals the pressed button's. Without JavaScript every panel is shown.
for (const group of document.querySelectorAll("[data-tabs]")) {
  const buttons = [...group.querySelectorAll(".tabs button")];
  const panels = [...group.querySelectorAll("[data-tab]")];
  const show = (name) => {
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.value === name));
    for (const panel of panels) panel.hidden = panel.dataset.tab !== name;
  };
  for (const button of buttons) button.addEventListener("click", () => show(button.value));
  if (buttons.length) show(buttons[0].value);
}
