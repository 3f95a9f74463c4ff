
for (const row of document.querySelectorAll(".videos")) playInStep(row);
